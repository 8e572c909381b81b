"""Where memory goes: the peak meter."""
