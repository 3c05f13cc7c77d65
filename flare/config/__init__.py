"""Options: declared once, parsed from the command line and JSON files, validated together."""
