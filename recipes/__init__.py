"""The staged recipe, its domains and bases, the report, the command line."""
