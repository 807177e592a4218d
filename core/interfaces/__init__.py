"""One abstract base class per plugin kind. A plugin implements one of these and nothing else."""
