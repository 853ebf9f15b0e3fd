"""A runner of generations that draws 16×16 images with numpy, for many workers on few cores."""
