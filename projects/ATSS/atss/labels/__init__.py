"""Labels: read every format into COCO's, check, choose classes, split."""
