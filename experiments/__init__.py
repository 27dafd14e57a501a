"""Every training run of the homework: as data, trained, recorded, and beside the reference."""
