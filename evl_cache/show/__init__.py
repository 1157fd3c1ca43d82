"""Draw what a tower and a head see in a clip: one view of it (`view`), or a page of a run's clips (`page`)."""
