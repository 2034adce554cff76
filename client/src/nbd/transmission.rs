//! One connection that serves an export.
//!
//! ```text
//! Open ----DISCONNECT or end of stream----> Leaving --nothing under way, outbox empty--> Ended::ByClient
//! any  ----an answer is Superseded--------> Ended::Superseded, that request unanswered
//! any  ----garbage or socket error--------> NbdError, at once
//! ```
//! Each time it is woken a connection takes all answers, writes them at once, reads what the window allows and hands in
//! all whole requests.

use super::decoder::{Decoder, Frame};
use super::outbox::Outbox;
use super::under_way::{Asked, Inbox, UnderWay};
use super::wire::{self, Request, command, error};
use super::{Limits, NbdError};
use crate::block::{BlockOp, BlockRequest, BlockResult, BlockTarget, MAX_REQUEST_BYTES};
use bytes::Bytes;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// How a connection ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The client said goodbye or closed; everything it asked for was done.
    ByClient,
    /// A successor has the volume: at least one request was left unanswered, and the process is to exit (protocol R10).
    Superseded,
}

pub(super) struct Transmission<S> {
    stream: S,
    target: Arc<dyn BlockTarget>,
    limits: Limits,
    decoder: Decoder,
    under_way: UnderWay,
    inbox: Arc<Inbox>,
    answers: Vec<(u64, BlockResult)>,
    outbox: Outbox,
    leaving: bool,
    superseded: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Transmission<S> {
    pub(super) fn new(stream: S, target: Arc<dyn BlockTarget>, limits: Limits) -> Self {
        Self {
            stream,
            target,
            limits,
            decoder: Decoder::default(),
            under_way: UnderWay::default(),
            inbox: Arc::default(),
            answers: Vec::new(),
            outbox: Outbox::default(),
            leaving: false,
            superseded: false,
        }
    }

    pub(super) async fn run(mut self) -> Result<Ended, NbdError> {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Ended, NbdError>> {
        loop {
            let answered = self.take_answers(cx);
            if self.superseded {
                return Poll::Ready(Ok(Ended::Superseded));
            }
            let written = self.outbox.poll_write(&mut self.stream, cx)?.is_ready();
            if self.leaving && written && self.under_way.len() == 0 {
                return Poll::Ready(Ok(Ended::ByClient));
            }
            if !answered && !self.take_requests(cx)? {
                return Poll::Pending;
            }
        }
    }

    /// Encode the answers that are there; whether there were any.
    fn take_answers(&mut self, cx: &Context<'_>) -> bool {
        let mut answers = std::mem::take(&mut self.answers);
        let any = self.inbox.poll_take(&mut answers, cx).is_ready();
        for (tag, result) in answers.drain(..) {
            self.take_answer(tag, result);
        }
        self.answers = answers;
        any
    }

    fn take_answer(&mut self, tag: u64, result: BlockResult) {
        let asked = self.under_way.asked(tag);
        if result.is_ok() && std::mem::take(&mut asked.then_flush) {
            return self.submit(tag, BlockOp::Flush);
        }
        let asked = self.under_way.finish(tag);
        match result.map_err(wire::error_number) {
            Ok(payload) => self.outbox.push(0, asked.cookie, payload),
            Err(Some(number)) => self.outbox.push(number, asked.cookie, Bytes::new()),
            Err(None) => self.superseded = true,
        }
    }

    fn window_open(&self) -> bool {
        let bytes = self.under_way.bytes() + self.outbox.len();
        !self.leaving && self.under_way.len() < self.limits.requests.max(1) && bytes < self.limits.bytes.max(1)
    }

    /// Hand in what is whole, read more if the window allows; whether anything moved.
    fn take_requests(&mut self, cx: &mut Context<'_>) -> Result<bool, NbdError> {
        let mut moved = false;
        while self.window_open() {
            match self.decoder.next().map_err(|_| NbdError::Protocol("wrong request magic"))? {
                Some(Frame::Request(request, payload)) => self.take_request(request, payload),
                Some(Frame::TooLong(request)) => self.outbox.push(error::EINVAL, request.cookie, Bytes::new()),
                None if moved => return Ok(true),
                None => return self.read(cx),
            }
            moved = true;
        }
        Ok(moved)
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Result<bool, NbdError> {
        match pin!(self.stream.read_buf(self.decoder.room())).poll(cx)? {
            Poll::Ready(0) => self.leaving = true,
            Poll::Ready(_) => {}
            Poll::Pending => return Ok(false),
        }
        Ok(true)
    }

    fn take_request(&mut self, request: Request, payload: Bytes) {
        if request.kind == command::DISCONNECT {
            self.leaving = true;
            return;
        }
        match operation(&request, payload, &*self.target) {
            Ok(op) => {
                let then_flush = request.kind == command::TRIM && request.flags & command::FLAG_FUA != 0;
                let asked = Asked { cookie: request.cookie, weight: weight(&request), then_flush };
                let tag = self.under_way.begin(asked);
                self.submit(tag, op);
            }
            Err(answer) => self.outbox.push(answer, request.cookie, Bytes::new()),
        }
    }

    fn submit(&self, tag: u64, op: BlockOp) {
        self.target.submit(BlockRequest { op, tag, completions: self.inbox.clone() });
    }
}

/// Bytes of memory that a request holds until it is answered.
fn weight(request: &Request) -> usize {
    match request.kind {
        command::READ | command::WRITE => request.length as usize,
        _ => 0,
    }
}

/// What the target is asked, or the error number that answers the request at once (0 for a request of nothing).
fn operation(request: &Request, payload: Bytes, target: &dyn BlockTarget) -> Result<BlockOp, u32> {
    let &Request { flags, kind, offset, length, .. } = request;
    if !matches!(kind, command::READ | command::WRITE | command::FLUSH | command::TRIM | command::WRITE_ZEROES) {
        return Err(error::EINVAL);
    }
    let no_hole = if kind == command::WRITE_ZEROES { command::FLAG_NO_HOLE } else { 0 };
    if flags & !(command::FLAG_FUA | no_hole) != 0 {
        return Err(error::EINVAL);
    }
    let fua = flags & command::FLAG_FUA != 0;
    let changes = !matches!(kind, command::READ | command::FLUSH);
    if changes && target.read_only() {
        return Err(error::EPERM);
    }
    if kind == command::FLUSH {
        return Ok(BlockOp::Flush);
    }
    if offset.checked_add(u64::from(length)).is_none_or(|end| end > target.size()) {
        return Err(if changes { error::ENOSPC } else { error::EINVAL });
    }
    match kind {
        _ if length == 0 => Err(0),
        command::READ if length > MAX_REQUEST_BYTES => Err(error::EINVAL),
        command::READ => Ok(BlockOp::Read { address: offset, length }),
        command::WRITE => Ok(BlockOp::Write { address: offset, payload, fua }),
        command::TRIM => Ok(BlockOp::Discard { address: offset, length: u64::from(length) }),
        _ => Ok(BlockOp::WriteZeroes { address: offset, length: u64::from(length), fua }),
    }
}
