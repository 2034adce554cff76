//! fio in a pod, which writes at random, reads everything back and compares, over and over.
//!
//! Invariant: an I/O error or a block that is not what was written ends the load at once, and [`Load::end`] fails.

use std::process::{Child, Stdio};

use lamina_cluster::image::{self, FIO};

use crate::manifests::{claim, pod};
use crate::stage::Stage;

/// Writes and verifies a file of 8 MiB in blocks of 4 KiB past the page cache; each round is a line.
const ROUNDS: &str = "cd /data; i=0; while [ ! -e /tmp/stop ]; do i=$((i + 1)); \
    fio --name=verify --filename=/data/verify --size=8M --bs=4k --rw=randwrite --randseed=$i --ioengine=libaio \
        --iodepth=8 --direct=1 --fsync=64 --verify=crc32c --verify_fatal=1 --verify_backlog=512 >/tmp/fio 2>&1 \
        || { cat /tmp/fio; exit 1; }; \
    echo round $i; done; echo done";

/// A pod under load.
pub(crate) struct Load<'a> {
    stage: &'a Stage,
    pod: String,
    fio: Option<Child>,
}

impl<'a> Load<'a> {
    /// A pod of this name on a node, with a claim of the same name, and fio at work in it.
    pub(crate) fn start(stage: &'a Stage, name: &str, node: &str) -> Self {
        stage.import(&image::fio());
        let busybox = lamina_cluster::image::BUSYBOX;
        let text = claim(name, "96Mi", "Filesystem", "lamina-demo") + &pod(name, name, false, node);
        stage.cluster.apply(&text.replace(busybox, FIO)).unwrap();
        stage.await_pod(name, "");
        let words = stage.cluster.kubectl_words(&["exec", name, "--", "sh", "-c", ROUNDS]);
        let fio = std::process::Command::new(&words[0])
            .args(&words[1..])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let load = Self { stage, pod: name.to_owned(), fio: Some(fio) };
        load.await_rounds(1);
        load
    }

    /// Waits until so many rounds more began: what was written before them has been read back.
    pub(crate) fn await_rounds(&self, more: u32) {
        let round = || -> u32 {
            let text = self.stage.sh(&self.pod, "ps -o args | grep -o 'randseed=[0-9]*' | sort -u | tail -n 1");
            text.ok().and_then(|text| text.trim().rsplit_once('=')?.1.parse().ok()).unwrap_or(0)
        };
        let mut begun = 0;
        self.stage.await_that("fio to work", 60, || {
            begun = round();
            begun > 0
        });
        self.stage.await_that("rounds of fio", 120, || round() >= begun + more);
    }

    /// Ends it; every byte that it read was what it had written.
    pub(crate) fn end(mut self) {
        self.stage.sh(&self.pod, "touch /tmp/stop").unwrap();
        let output = self.fio.take().expect("taken only here").wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("done"), "{text}");
        assert!(text.matches("round ").count() >= 2, "the load went on: {text}");
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        if let Some(mut fio) = self.fio.take() {
            fio.kill().ok();
            fio.wait().ok();
        }
    }
}
