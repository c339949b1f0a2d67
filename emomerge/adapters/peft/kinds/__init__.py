"""The types of PEFT adapters with an explicit formula, one file each; see the table in `peft.types`."""
