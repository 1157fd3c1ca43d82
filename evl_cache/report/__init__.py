"""Report on finished runs and sweeps: `data` gathers, `plots` draws and `page` writes a page."""
