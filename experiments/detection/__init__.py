"""Objects found in images of two bands, visible and infrared: scenes, folders of real pairs, a detector and its
precision."""
