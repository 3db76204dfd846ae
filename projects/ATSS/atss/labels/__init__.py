"""Labels: reading every format into COCO's content, checking, choosing classes, splitting."""
