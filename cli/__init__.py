"""What a person types: options in, one call, a table or JSON out."""
