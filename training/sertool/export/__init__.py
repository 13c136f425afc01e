"""Export of a run to one self-describing file for the device."""
