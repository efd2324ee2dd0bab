"""Pictures as arrays and files, and many of them in one."""
