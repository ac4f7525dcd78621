# 1 node, 2 processes on each, 1 CPU thread for each process, no GPU
# environment variables passed on if set: WANDB_API_KEY MLFLOW_TRACKING_URI

PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    CUDA_VISIBLE_DEVICES='' \
    GOMP_SPINCOUNT=1000 \
    python \
    -m roma_core.claim JOB_FOLDER 1 \
    -- python \
    -m torch.distributed.run \
    --nnodes=1 \
    --nproc-per-node=2 \
    --node-rank=0 \
    --master-addr=127.0.0.1 \
    --master-port=FREE_PORT \
    --max-restarts=0 \
    --log-dir=JOB_FOLDER/attempts/1/torchrun \
    -m roma_core.cli pretrain \
    --job '$$(a '"'"'strange'"'"' folder)'
