//! The C ABI of include/textkit.h: pointers in, statuses out. What the calls do lies in the modules; here
//! arguments are checked, results handed over and panics stopped.

mod methods;
mod pyfmt;
mod template;
mod tokenizer;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;

use template::Template;
use tokenizer::Tokenizer;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    Ok = 0,
    Arg = 1,
    Parse = 2,
    Template = 3,
    Raised = 4,
    Limit = 5,
    Panic = 99,
}

/// What went wrong, on its way to the caller.
#[derive(Debug)]
pub struct Failure {
    pub status: Status,
    pub message: String,
}

impl Failure {
    pub fn new(status: Status, message: impl ToString) -> Failure {
        Failure { status, message: message.to_string() }
    }
}

#[repr(C)]
pub struct TkBytes {
    data: *mut u8,
    len: usize,
    cap: usize,
}

#[repr(C)]
pub struct TkIds {
    data: *mut u32,
    len: usize,
    cap: usize,
}

/// Immutable objects cross threads: the compiler checks that they may.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
    shared::<Template>();
};

unsafe fn give_bytes(out: *mut TkBytes, bytes: Vec<u8>) {
    if !out.is_null() {
        let mut bytes = std::mem::ManuallyDrop::new(bytes);
        *out = TkBytes { data: bytes.as_mut_ptr(), len: bytes.len(), cap: bytes.capacity() };
    }
}

/// Runs `body`; a failure or panic becomes a status and a message.
unsafe fn guarded(err: *mut TkBytes, body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Status::Ok as i32,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = payload
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            Failure::new(Status::Panic, format!("internal panic: {text}"))
        }
    };
    give_bytes(err, failure.message.into_bytes());
    failure.status as i32
}

unsafe fn bytes_of<'a>(data: *const u8, n: usize) -> Result<&'a [u8], Failure> {
    match (data.is_null(), n) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Failure::new(Status::Arg, "null text")),
        _ => Ok(std::slice::from_raw_parts(data, n)),
    }
}

unsafe fn text_of<'a>(data: *const u8, n: usize) -> Result<&'a str, Failure> {
    std::str::from_utf8(bytes_of(data, n)?)
        .map_err(|e| Failure::new(Status::Arg, format!("text is not UTF-8 at byte {}", e.valid_up_to())))
}

#[no_mangle]
pub extern "C" fn tk_init() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| {})));
}

#[no_mangle]
pub unsafe extern "C" fn tk_test_panic() -> i32 {
    guarded(ptr::null_mut(), || panic!("asked for"))
}

#[no_mangle]
pub unsafe extern "C" fn tk_bytes_free(bytes: *mut TkBytes) {
    if let Some(bytes) = bytes.as_mut() {
        if !bytes.data.is_null() {
            drop(Vec::from_raw_parts(bytes.data, bytes.len, bytes.cap));
        }
        *bytes = TkBytes { data: ptr::null_mut(), len: 0, cap: 0 };
    }
}

#[no_mangle]
pub unsafe extern "C" fn tk_ids_free(ids: *mut TkIds) {
    if let Some(ids) = ids.as_mut() {
        if !ids.data.is_null() {
            drop(Vec::from_raw_parts(ids.data, ids.len, ids.cap));
        }
        *ids = TkIds { data: ptr::null_mut(), len: 0, cap: 0 };
    }
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_new(
    json: *const u8,
    n: usize,
    out: *mut *mut Tokenizer,
    err: *mut TkBytes,
) -> i32 {
    guarded(err, || {
        let tokenizer = Tokenizer::new(bytes_of(json, n)?)?;
        *out = Box::into_raw(Box::new(tokenizer));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_vocab_size(tokenizer: *const Tokenizer) -> usize {
    (*tokenizer).vocab_size()
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_is_byte_level(tokenizer: *const Tokenizer) -> i32 {
    (*tokenizer).is_byte_level() as i32
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_token_id(tokenizer: *const Tokenizer, s: *const u8, n: usize) -> i64 {
    match text_of(s, n) {
        Ok(text) => (*tokenizer).token_id(text).map_or(-1, i64::from),
        Err(_) => -1,
    }
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_token_bytes(
    tokenizer: *const Tokenizer,
    id: u32,
    p: *mut *const u8,
    n: *mut usize,
) -> i32 {
    match (*tokenizer).token(id) {
        Some((bytes, flags)) => {
            *p = bytes.as_ptr();
            *n = bytes.len();
            flags as i32
        }
        None => {
            *p = ptr::null();
            *n = 0;
            -1
        }
    }
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_encode(
    tokenizer: *const Tokenizer,
    s: *const u8,
    n: usize,
    parse_added: i32,
    add_special: i32,
    out: *mut TkIds,
    err: *mut TkBytes,
) -> i32 {
    guarded(err, || {
        let ids = (*tokenizer).encode(text_of(s, n)?, parse_added != 0, add_special != 0)?;
        let mut ids = std::mem::ManuallyDrop::new(ids);
        *out = TkIds { data: ids.as_mut_ptr(), len: ids.len(), cap: ids.capacity() };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn tk_tokenizer_decode(
    tokenizer: *const Tokenizer,
    ids: *const u32,
    n: usize,
    skip_special: i32,
    out: *mut TkBytes,
    err: *mut TkBytes,
) -> i32 {
    guarded(err, || {
        let ids = if n == 0 { &[] } else { std::slice::from_raw_parts(ids, n) };
        give_bytes(out, (*tokenizer).decode(ids, skip_special != 0)?.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn tk_template_new(
    src: *const u8,
    n: usize,
    out: *mut *mut Template,
    err: *mut TkBytes,
) -> i32 {
    guarded(err, || {
        let template = Template::new(text_of(src, n)?)?;
        *out = Box::into_raw(Box::new(template));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn tk_template_free(template: *mut Template) {
    if !template.is_null() {
        drop(Box::from_raw(template));
    }
}

#[no_mangle]
pub unsafe extern "C" fn tk_template_render(
    template: *const Template,
    variables: *const u8,
    n: usize,
    fuel: u64,
    out: *mut TkBytes,
    err: *mut TkBytes,
) -> i32 {
    guarded(err, || {
        give_bytes(out, (*template).render(text_of(variables, n)?, fuel)?.into_bytes());
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_becomes_a_status() {
        assert_eq!(unsafe { tk_test_panic() }, 99);
    }

    #[test]
    fn text_that_is_not_utf8_is_refused() {
        let bytes = [b'a', 0xff];
        let failure = unsafe { text_of(bytes.as_ptr(), 2) }.unwrap_err();
        assert_eq!(failure.status, Status::Arg);
        assert!(failure.message.contains("byte 1"));
    }
}
