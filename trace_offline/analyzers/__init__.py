"""Measurements of a checkpoint or a series: one analyzer a module, all behind one contract."""
