"""SchNet on molecules (QM9) and on crystals (Materials Project)."""
