"""How well a checkpoint does: one small file per kind of measure."""
