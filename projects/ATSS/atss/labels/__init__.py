"""Labels: read every format into COCO's, check them, choose classes, make splits."""
