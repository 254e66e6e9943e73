"""What a run leaves on disk, readable without torch: one record a run, and the stream of a run that is being watched."""
