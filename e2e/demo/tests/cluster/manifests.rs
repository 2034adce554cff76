//! Manifests of the cases, and small things that many of them do in a pod.

use crate::stage::Stage;

/// A claim of the demo's class.
pub(crate) fn claim(name: &str, size: &str, mode: &str, class: &str) -> String {
    format!(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}}}
spec:
  accessModes: [ReadWriteOnce]
  volumeMode: {mode}
  storageClassName: {class}
  resources: {{requests: {{storage: {size}}}}}
---
"
    )
}

/// A pod with a shell that uses a claim at /data or as /dev/data; on `node` if that is not empty.
pub(crate) fn pod(name: &str, claim: &str, device: bool, node: &str) -> String {
    let place = if device {
        "volumeDevices: [{name: data, devicePath: /dev/data}]"
    } else {
        "volumeMounts: [{name: data, mountPath: /data}]"
    };
    let select =
        if node.is_empty() { String::new() } else { format!("  nodeSelector: {{kubernetes.io/hostname: {node}}}\n") };
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
{select}  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: lamina.dev/busybox:1
    imagePullPolicy: Never
    command: [sleep, \"100000\"]
    {place}
  volumes: [{{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}]
"
    )
}

/// A class of the demo's policy with another filesystem.
pub(crate) fn class(stage: &Stage, name: &str, filesystem: &str) {
    let text = format!(
        "apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {name}}}
provisioner: csi.lamina.dev
allowVolumeExpansion: true
volumeBindingMode: WaitForFirstConsumer
parameters: {{policy: demo, csi.storage.k8s.io/fstype: {filesystem}}}
"
    );
    stage.cluster.apply(&text).unwrap();
}

/// Writes 24 MiB of noise, waits for the disk, and returns its sum.
pub(crate) fn write_noise(stage: &Stage, pod: &str) -> String {
    let script = "dd if=/dev/urandom of=/data/noise bs=1M count=24 conv=fsync 2>/dev/null && sha256sum < /data/noise";
    stage.sh(pod, script).unwrap()
}

/// The sum of what [`write_noise`] wrote, read from the disk.
pub(crate) fn noise(stage: &Stage, pod: &str) -> String {
    stage.sh(pod, "echo 3 > /proc/sys/vm/drop_caches 2>/dev/null; sha256sum < /data/noise").unwrap()
}
