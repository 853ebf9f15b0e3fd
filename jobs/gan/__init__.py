"""The networks and all that trains and samples them."""
