"""What a job is (specs, states, kinds) and the work itself. Imports nothing else of ganq."""
