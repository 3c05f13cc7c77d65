"""Where documents come from: files, folders, hub data sets, the embedded corpus."""
