#!/bin/bash
# Compare proposals of several rules on small data: box AP of Faster R-CNN and recall of the proposals.
#
#     tools/benchmarks/two_stage.sh DATA OUTPUT
#
# DATA contains bccd (json of COCO) and aquarium (data.yaml). An interrupted comparison continues, and
# what is finished is not repeated. Results: OUTPUT/<data>/<row>/<seed>/{log.txt,recall/log.txt}.
set -e
data=$1 output=$2 root=$(dirname "$0")/../..
declare -A train=([bccd]=$data/bccd/train.json:$data/bccd/images [aquarium]=$data/aquarium/data.yaml:train)
declare -A val=([bccd]=$data/bccd/val.json:$data/bccd/images [aquarium]=$data/aquarium/data.yaml:val)
declare -A classes=([bccd]=3 [aquarium]=7)

for set in bccd aquarium; do for seed in 0 1; do
for row in Faster_lite0_FPN_small{,_MaxIoU_RPN,_ATSS_RPN,_ATSS_first_stage}; do
    out=$output/$set/$row/$seed
    [ -e "$out/finished" ] && continue
    run=(python "$root/tools/train_net.py" --config-file "two_stage/$row"
        --register "train=${train[$set]}" --register "val=${val[$set]}")
    keys=(DATASETS.TRAIN '("train",)' DATASETS.TEST '("val",)' SEED "$seed"
        MODEL.ROI_HEADS.NUM_CLASSES "${classes[$set]}")
    "${run[@]}" --resume "${keys[@]}" OUTPUT_DIR "$out"
    "${run[@]}" --eval-only "${keys[@]}" OUTPUT_DIR "$out/recall" \
        MODEL.META_ARCHITECTURE ProposalNetwork MODEL.WEIGHTS "$out/model_final.pth"
    touch "$out/finished"
done; done; done
