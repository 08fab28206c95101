"""Numbers that other programs measured, brought into a store beside our own."""
