//! What a device may hold after a power cut: per block and per record the values that the contract allows.
//!
//! Flushed (or committed) = exact; else the old value or any later one that was handed in (promise 4 of the contract).

use lamina_protocol::layer::BlockState;

/// What was there when a block became stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    Nothing,
    Hole,
    Data(u64),
}

/// A block's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Absent,
    Hole,
    /// With what was kept for a force.
    Stale(Kept),
    /// Data with this version in every word.
    Data(u64),
}

impl Value {
    pub(super) fn state(self) -> BlockState {
        match self {
            Self::Absent => BlockState::Absent,
            Self::Hole => BlockState::Hole,
            Self::Stale(_) => BlockState::Stale,
            Self::Data(_) => BlockState::Present,
        }
    }

    /// H7.
    pub(super) fn marked(self) -> Self {
        if self == Self::Absent { Self::Absent } else { self.stale() }
    }

    pub(super) fn stale(self) -> Self {
        match self {
            Self::Absent => Self::Stale(Kept::Nothing),
            Self::Hole => Self::Stale(Kept::Hole),
            Self::Data(version) => Self::Stale(Kept::Data(version)),
            Self::Stale(_) => self,
        }
    }

    /// I8. Where nothing was kept a page without a slot has a hole, one with a slot still says stale.
    pub(super) fn trusted(self) -> Self {
        match self {
            Self::Stale(Kept::Data(version)) => Self::Data(version),
            Self::Stale(Kept::Hole) => Self::Hole,
            other => other,
        }
    }
}

/// What one operation does to one page.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    Write {
        first: u32,
        versions: Vec<u64>,
    },
    Shape {
        first: u32,
        count: u32,
        value: Value,
    },
    Pending(bool),
    Mark,
    ClearUnsynced,
    Drop,
    /// The layer's mark: like `Mark`, without the page's own flag.
    LayerMark,
    /// A person's force on the layer.
    LayerTrust,
    StaleBlocks(Vec<u32>),
}

impl Effect {
    /// Durable with its answer.
    pub(super) fn is_commit(&self) -> bool {
        !matches!(self, Self::Write { .. } | Self::Shape { .. })
    }
}

/// Possible values with the number of the operation that each came from, oldest first.
#[derive(Clone, Debug)]
pub(super) struct Register<T>(pub(super) Vec<(u64, T)>);

impl<T: Copy + PartialEq> Register<T> {
    fn new(value: T) -> Self {
        Self(vec![(0, value)])
    }

    fn add(&mut self, op: u64, value: T) {
        self.0.push((op, value));
    }

    fn map(&mut self, op: u64, change: impl Fn(T) -> T) {
        let now: Vec<T> = self.0.iter().map(|(_, value)| change(*value)).collect();
        for value in now {
            if !self.0.contains(&(op, value)) {
                self.0.push((op, value));
            }
        }
    }

    /// Everything before this operation is out of the question.
    fn settle(&mut self, op: u64) {
        if self.0.iter().any(|(from, _)| *from >= op) {
            self.0.retain(|(from, _)| *from >= op);
        }
    }

    /// The latest of these operations that touched it is durable.
    fn flush(&mut self, durable: &impl Fn(u64) -> bool) {
        let last = self.0.iter().rev().find(|(op, _)| durable(*op)).map_or(0, |(op, _)| *op);
        self.settle(last);
    }

    pub(super) fn allows(&self, value: T) -> bool {
        self.0.iter().any(|(_, allowed)| *allowed == value)
    }
}

impl Register<Value> {
    /// A force may have happened.
    pub(super) fn trust(&mut self, op: u64) {
        self.map(op, Value::trusted);
        if self.0.contains(&(op, Value::Stale(Kept::Nothing))) {
            self.add(op, Value::Hole);
        }
    }

    /// A force was answered.
    pub(super) fn only_trusted(&mut self) {
        self.trust(u64::MAX);
        self.settle(u64::MAX);
    }

    /// A value as it is seen: of a stale block nothing but that it is.
    pub(super) fn shows(&self, seen: Value) -> bool {
        let same =
            |value: &Value| *value == seen || value.state() == BlockState::Stale && seen.state() == BlockState::Stale;
        self.0.iter().any(|(_, allowed)| same(allowed))
    }
}

/// One page.
#[derive(Clone, Debug)]
pub(super) struct PageOracle {
    pub(super) blocks: Vec<Register<Value>>,
    pub(super) pending: Register<bool>,
    pub(super) unsynced: Register<bool>,
}

impl PageOracle {
    pub(super) fn new(blocks: u32) -> Self {
        Self {
            blocks: vec![Register::new(Value::Absent); blocks as usize],
            pending: Register::new(false),
            unsynced: Register::new(false),
        }
    }

    /// The operation was handed in: from now on it may have happened.
    pub(super) fn handed_in(&mut self, op: u64, effect: &Effect) {
        match effect {
            Effect::Write { first, versions } => {
                for (nth, version) in versions.iter().enumerate() {
                    self.blocks[*first as usize + nth].add(op, Value::Data(*version));
                }
            }
            Effect::Shape { first, count, value: Value::Stale(_) } => {
                (*first..first + count).for_each(|block| self.blocks[block as usize].map(op, Value::stale));
            }
            Effect::Shape { first, count, value } => {
                (*first..first + count).for_each(|block| self.blocks[block as usize].add(op, *value));
            }
            Effect::Pending(set) => self.pending.add(op, *set),
            Effect::Mark | Effect::LayerMark => {
                self.blocks.iter_mut().for_each(|block| block.map(op, Value::marked));
                if matches!(effect, Effect::Mark) {
                    self.unsynced.add(op, true);
                }
            }
            Effect::LayerTrust => self.blocks.iter_mut().for_each(|block| block.trust(op)),
            Effect::ClearUnsynced => self.unsynced.add(op, false),
            Effect::Drop => {
                self.blocks.iter_mut().for_each(|block| block.add(op, Value::Absent));
                self.pending.add(op, false);
                self.unsynced.add(op, false);
            }
            Effect::StaleBlocks(blocks) => {
                blocks.iter().for_each(|block| self.blocks[*block as usize].map(op, Value::stale));
            }
        }
    }

    /// The operation was answered.
    pub(super) fn answered(&mut self, op: u64, effect: &Effect) {
        match effect {
            Effect::Write { .. } | Effect::Shape { .. } => {}
            Effect::Pending(_) => self.pending.settle(op),
            Effect::Mark | Effect::LayerMark | Effect::LayerTrust => {
                self.blocks.iter_mut().for_each(|block| block.settle(op));
                if matches!(effect, Effect::Mark) {
                    self.unsynced.settle(op);
                }
            }
            Effect::ClearUnsynced => self.unsynced.settle(op),
            Effect::Drop => {
                self.blocks.iter_mut().for_each(|block| block.settle(op));
                self.pending.settle(op);
                self.unsynced.settle(op);
            }
            Effect::StaleBlocks(blocks) => blocks.iter().for_each(|block| self.blocks[*block as usize].settle(op)),
        }
    }

    /// A flush was answered: all of these operations are durable.
    pub(super) fn flushed(&mut self, durable: &impl Fn(u64) -> bool) {
        self.blocks.iter_mut().for_each(|block| block.flush(durable));
    }
}
