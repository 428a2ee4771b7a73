"""The configuration: YAML tree, one loader, command line, and what is generated from the settings classes."""
