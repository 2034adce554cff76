//! Volumes for the tests: one that outlives its process, one that never answers, one whose process is superseded.

use lamina_client::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget};
use lamina_client::ram::RamVolume;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Bytes in a file. Requests take effect in order and are answered some later, so that a process that is killed leaves
/// requests that took effect and were never answered.
pub(crate) struct FileVolume {
    file: File,
    queue: Sender<BlockRequest>,
}

impl FileVolume {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (queue, requests) = channel();
        let worker = file.try_clone().unwrap();
        std::thread::spawn(move || work(&worker, &requests));
        Self { file, queue }
    }
}

impl BlockTarget for FileVolume {
    fn size(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        self.queue.send(request).unwrap();
    }
}

fn work(file: &File, requests: &Receiver<BlockRequest>) {
    while let Ok(first) = requests.recv() {
        let batch: Vec<_> = std::iter::once(first).chain(requests.try_iter().take(15)).collect();
        let answers: Vec<_> = batch.iter().map(|request| apply(file, &request.op)).collect();
        std::thread::sleep(Duration::from_millis(2));
        for (request, answer) in batch.into_iter().zip(answers) {
            request.completions.complete(request.tag, answer);
        }
    }
}

fn apply(file: &File, op: &BlockOp) -> BlockResult {
    let done = match op {
        BlockOp::Read { address, length } => {
            assert!(address % 4096 == 0 && length % 4096 == 0, "whole blocks only: {op:?}");
            let mut bytes = vec![0; *length as usize];
            file.read_exact_at(&mut bytes, *address).unwrap();
            bytes
        }
        BlockOp::Write { address, payload, .. } => {
            assert!(address % 4096 == 0 && payload.len() % 4096 == 0, "whole blocks only: {op:?}");
            file.write_all_at(payload, *address).unwrap();
            Vec::new()
        }
        BlockOp::Discard { address, length } | BlockOp::WriteZeroes { address, length, .. } => {
            file.write_all_at(&vec![0; *length as usize], *address).unwrap();
            Vec::new()
        }
        BlockOp::Flush => Vec::new(),
    };
    Ok(done.into())
}

/// Takes requests and never answers.
#[derive(Default)]
pub(crate) struct Deaf {
    pub(crate) heard: AtomicUsize,
    kept: std::sync::Mutex<Vec<BlockRequest>>,
}

impl BlockTarget for Deaf {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        if matches!(request.op, BlockOp::Flush) {
            // The loop device's own, before it is there.
            return request.completions.complete(request.tag, Ok(Vec::new().into()));
        }
        self.kept.lock().unwrap().push(request);
        self.heard.fetch_add(1, Ordering::Relaxed);
    }
}

/// A volume that a successor has taken.
pub(crate) struct Superseding;

impl BlockTarget for Superseding {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        if matches!(request.op, BlockOp::Flush) {
            return RamVolume::new(4096).submit(request);
        }
        request.completions.complete(request.tag, Err(BlockError::Superseded));
    }
}
