"""Makes the bucket of MLflow's artifacts, if it is not there; waits for the object store."""

import os
import time

import boto3
from botocore.exceptions import ClientError, EndpointConnectionError

BUCKET = "mlflow"
DEADLINE_S = 300

store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
end = time.monotonic() + DEADLINE_S
while True:
    try:
        if BUCKET not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
            store.create_bucket(Bucket=BUCKET)
        print(f"bucket {BUCKET} is there")
        break
    except (EndpointConnectionError, ClientError) as error:
        if time.monotonic() > end:
            raise
        print(f"not yet: {error}")
        time.sleep(2)
