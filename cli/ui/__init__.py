"""Tables, text and progress for people, JSON for programs."""
