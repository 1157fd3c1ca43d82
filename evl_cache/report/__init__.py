"""A page on finished runs and sweeps: `data` gathers, `plots` draws, `page` writes."""
