"""Write a model as a folder that can be shared, and upload it."""
