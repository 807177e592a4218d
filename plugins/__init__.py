"""Built-in plugins, found through entry points like any other."""
