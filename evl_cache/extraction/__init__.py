"""The parts of stage one: which block comes next (`block_taker`), how it is made (`block` and what it is made of)."""
