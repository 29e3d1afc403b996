#!/bin/sh
# Amazon tells a spot instance two minutes before it is taken. Waits for that, and then empties this node.
metadata=${METADATA:-http://169.254.169.254/latest}
until token=$(curl -sf -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/api/token") &&
    curl -sf -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"; do
    sleep 5
done
exec python "$(dirname "$0")/leave_node.py" 60
