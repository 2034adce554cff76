//! A disk in memory: blocks that are not there are zeroes, so that a device costs what was written to it.

use crate::store::aligned::AlignedBuf;
use crate::store::disk::Disk;
use crate::store::geometry::BLOCK;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;

#[derive(Clone)]
pub(super) struct MemoryDisk {
    blocks: RefCell<BTreeMap<u64, Vec<u8>>>,
    bytes: u64,
}

impl MemoryDisk {
    pub(super) fn new(bytes: u64) -> Self {
        Self { blocks: RefCell::default(), bytes }
    }

    pub(super) fn with(bytes: u64, blocks: &[(u64, Vec<u8>)]) -> Self {
        Self { blocks: RefCell::new(blocks.iter().cloned().collect()), bytes }
    }

    /// What was written, by the byte at which each block begins.
    pub(super) fn blocks(&self) -> Vec<(u64, Vec<u8>)> {
        self.blocks.borrow().iter().map(|(at, block)| (*at, block.clone())).collect()
    }

    /// The block that begins here.
    pub(super) fn block(&self, at: u64) -> Vec<u8> {
        assert!(at.is_multiple_of(BLOCK));
        self.blocks.borrow().get(&at).cloned().unwrap_or_else(|| vec![0; BLOCK as usize])
    }

    /// Bytes into the block that begins here; what would go beyond it is left out.
    pub(super) fn change(&mut self, at: u64, from: usize, bytes: &[u8]) {
        if at + BLOCK > self.bytes {
            return;
        }
        let mut block = self.block(at);
        let room = block.len().saturating_sub(from).min(bytes.len());
        block[from..from + room].copy_from_slice(&bytes[..room]);
        self.blocks.get_mut().insert(at, block);
    }
}

impl Disk for MemoryDisk {
    fn read(&self, at: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        assert!(at.is_multiple_of(BLOCK) && (buf.len() as u64).is_multiple_of(BLOCK), "whole blocks only");
        buf.fill(0);
        let end = at + buf.len() as u64;
        for (block, bytes) in self.blocks.borrow().range(at..end) {
            buf[(block - at) as usize..][..BLOCK as usize].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        assert!(at.is_multiple_of(BLOCK) && (data.len() as u64).is_multiple_of(BLOCK), "whole blocks only");
        assert!(at + data.len() as u64 <= self.bytes, "a write beyond the device's end");
        for (nth, block) in data.chunks(BLOCK as usize).enumerate() {
            let at = at + nth as u64 * BLOCK;
            if block.iter().all(|byte| *byte == 0) {
                self.blocks.borrow_mut().remove(&at);
            } else {
                self.blocks.borrow_mut().insert(at, block.to_vec());
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
}
