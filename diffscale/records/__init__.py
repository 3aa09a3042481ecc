"""Records: one metric of one evaluation of one checkpoint, with what made it and what it cost."""
