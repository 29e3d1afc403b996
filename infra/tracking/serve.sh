#!/bin/sh
# Starts MLflow in its container. What is secret is in the environment, in no file and on no command line: PGPASSWORD,
# AWS_SECRET_ACCESS_KEY, MLFLOW_AUTH_ADMIN_PASSWORD and MLFLOW_FLASK_SERVER_SECRET_KEY.
set -eu
export MLFLOW_AUTH_CONFIG_PATH="$(dirname "$0")/basic_auth.ini"

python - ${BUCKETS:?must name the buckets, that of the artifacts first, but is not set} <<'END'
import sys

import boto3

store = boto3.client("s3")
have = {each["Name"] for each in store.list_buckets()["Buckets"]}
for bucket in sys.argv[1:]:
    if bucket not in have:
        store.create_bucket(Bucket=bucket)
END

# The allowed hosts replace MLflow's own list, and each needs its ports. Health checks are let through by any name.
exec mlflow server --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --app-name basic-auth \
    --allowed-hosts "${ALLOWED_HOSTS:-mlflow,mlflow:*,localhost,localhost:*,127.0.0.1,127.0.0.1:*}" \
    --backend-store-uri postgresql+psycopg:///mlflow --serve-artifacts --artifacts-destination "s3://${BUCKETS%% *}"
