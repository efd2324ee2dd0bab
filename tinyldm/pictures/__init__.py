"""Pictures as arrays and files, grids of pictures, and animations."""
