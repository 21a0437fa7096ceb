#!/usr/bin/env bash
# Makes the Secrets of the cluster's own services, with random keys that are neither shown nor kept anywhere else:
#   k8s/make-secrets.sh [namespace]
# Those that are there stay as they are. For a bucket elsewhere, make k5dist-s3 by hand: docs/kubernetes.md.
set -euo pipefail
namespace=${1:-k5dist}
umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
make() { # name; the entries come by file, since arguments are seen by every process of the machine
  if kubectl get secret "$1" --namespace "$namespace" >/dev/null 2>&1; then
    echo "secret $1 is there"
  else
    kubectl create secret generic "$1" --namespace "$namespace" --from-env-file="$folder/$1"
  fi
}
cat >"$folder/k5dist-s3" <<END
AWS_ACCESS_KEY_ID=$(random 10)
AWS_SECRET_ACCESS_KEY=$(random 20)
AWS_ENDPOINT_URL=http://objects:9000
MLFLOW_S3_ENDPOINT_URL=http://objects:9000
AWS_DEFAULT_REGION=us-east-1
END
echo "POSTGRES_PASSWORD=$(random 20)" >"$folder/k5dist-postgres"
make k5dist-s3
make k5dist-postgres
