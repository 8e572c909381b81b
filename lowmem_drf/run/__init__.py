"""The commands' work, one file each."""
