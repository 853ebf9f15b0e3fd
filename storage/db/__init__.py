"""The job table: tables, engines, schema and queries."""
