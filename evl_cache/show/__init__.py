"""Pictures of what a tower and a head see of a clip."""
