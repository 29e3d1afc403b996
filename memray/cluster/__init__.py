"""Ray, DeepSpeed and MLflow: sweeps on a cluster."""

from memray.cluster.sealing import unseal

unseal()  # the processes of a job find in their environment what it was sent
