//! One tokenizer.json as two tokenizers over the same vocabulary: one that knows the added tokens, one to
//! which they are plain text. DeepSeek marks its role tokens as not special, so `encode_special_tokens` of
//! the library would still parse them in what a user wrote; taking them out of the JSON does not.

use std::collections::{BTreeMap, HashMap};

use serde_json::value::RawValue;
use serde_json::Value;
use tokenizers::Tokenizer as HfTokenizer;

use crate::{Failure, Status};

pub const ADDED: u8 = 1;
pub const SPECIAL: u8 = 2;
const HOLE: u8 = 0xff;

pub struct Tokenizer {
    full: HfTokenizer,
    plain: HfTokenizer,
    byte_level: bool,
    /// The bytes of token `id` are `arena[ends[id - 1]..ends[id]]`.
    arena: Vec<u8>,
    ends: Vec<usize>,
    flags: Vec<u8>,
}

impl Tokenizer {
    pub fn new(json: &[u8]) -> Result<Tokenizer, Failure> {
        let broken = |e: &dyn std::fmt::Display| Failure::new(Status::Parse, format!("tokenizer.json: {e}"));
        // The parts stay text: the vocabulary of a large model is 8 MB of it.
        let mut parts: BTreeMap<String, Box<RawValue>> =
            serde_json::from_slice(json).map_err(|e| broken(&e))?;
        let part = |name: &str| -> Result<Value, Failure> {
            let text = parts.get(name).map_or("null", |part| part.get());
            serde_json::from_str(text).map_err(|e| broken(&e))
        };
        let decoder = Decoder::read(&part("decoder")?);
        let mut added = part("added_tokens")?.as_array().cloned().unwrap_or_default();
        let full = HfTokenizer::from_bytes(json).map_err(|e| broken(&e))?;
        check_ids(&added, &full)?;
        // Runs of blanks that some checkpoints add are text like any other, not control.
        added.retain(|token| {
            token["content"].as_str().is_some_and(|s| s.bytes().all(|b| b.is_ascii_whitespace()))
        });
        let kept = serde_json::value::to_raw_value(&added).map_err(|e| broken(&e))?;
        parts.insert("added_tokens".to_string(), kept);
        let plain_json = serde_json::to_vec(&parts).map_err(|e| broken(&e))?;
        let plain = HfTokenizer::from_bytes(&plain_json).map_err(|e| broken(&e))?;
        let mut tokenizer = Tokenizer {
            full,
            plain,
            byte_level: matches!(decoder, Decoder::ByteLevel),
            arena: Vec::new(),
            ends: Vec::new(),
            flags: Vec::new(),
        };
        tokenizer.fill_table(&decoder)?;
        Ok(tokenizer)
    }

    fn fill_table(&mut self, decoder: &Decoder) -> Result<(), Failure> {
        // Ids are foreign numbers: the table must not follow one up to 2^32.
        const MAX_VOCAB: u32 = 1 << 24;
        let mut tokens: Vec<(u32, String, u8)> =
            self.full.get_vocab(true).into_iter().map(|(text, id)| (id, text, 0)).collect();
        for (id, token) in self.full.get_added_tokens_decoder() {
            tokens.push((id, token.content, ADDED | if token.special { SPECIAL } else { 0 }));
        }
        // Where a token is in the vocabulary and added, the added entry comes last and counts.
        tokens.sort_by(|a, b| (a.0, a.2).cmp(&(b.0, b.2)));
        let bytes_of_chars = byte_level_alphabet();
        let mut tokens = tokens.into_iter().peekable();
        while let Some((id, text, flags)) = tokens.next() {
            if tokens.peek().is_some_and(|next| next.0 == id) {
                continue;
            }
            if id >= MAX_VOCAB {
                let message = format!("tokenizer.json: token id {id}, expected less than {MAX_VOCAB}");
                return Err(Failure::new(Status::Parse, message));
            }
            self.ends.resize(id as usize, self.arena.len());
            self.flags.resize(id as usize, HOLE);
            if flags & ADDED != 0 {
                self.arena.extend_from_slice(text.as_bytes());
            } else {
                decoder.append_bytes(&text, &bytes_of_chars, &mut self.arena);
            }
            self.ends.push(self.arena.len());
            self.flags.push(flags);
        }
        Ok(())
    }

    pub fn vocab_size(&self) -> usize {
        self.flags.len()
    }

    pub fn is_byte_level(&self) -> bool {
        self.byte_level
    }

    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.full.token_to_id(text)
    }

    /// Bytes and flags; None where no token has this id.
    pub fn token(&self, id: u32) -> Option<(&[u8], u8)> {
        let id = id as usize;
        let flags = *self.flags.get(id)?;
        if flags == HOLE {
            return None;
        }
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        Some((&self.arena[begin..self.ends[id]], flags))
    }

    pub fn encode(&self, text: &str, parse_added: bool, add_special: bool) -> Result<Vec<u32>, Failure> {
        let tokenizer = if parse_added { &self.full } else { &self.plain };
        let encoding = tokenizer
            .encode_fast(text, add_special)
            .map_err(|e| Failure::new(Status::Parse, format!("encode: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Failure> {
        self.full.decode(ids, skip_special).map_err(|e| Failure::new(Status::Parse, format!("decode: {e}")))
    }
}

/// The library numbers added tokens itself and only logs when the file says otherwise; the model would then
/// read other tokens than the ones written.
fn check_ids(added: &[Value], tokenizer: &HfTokenizer) -> Result<(), Failure> {
    for token in added {
        let (content, id) = (token["content"].as_str().unwrap_or_default(), token["id"].as_u64());
        let given = tokenizer.token_to_id(content).map(u64::from);
        if given != id {
            let message =
                format!("tokenizer.json: added token {content:?} has id {id:?}, but only {given:?} is free");
            return Err(Failure::new(Status::Parse, message));
        }
    }
    Ok(())
}

/// How a token's text in the vocabulary stands for bytes.
enum Decoder {
    ByteLevel,
    SentencePiece { byte_fallback: bool },
    Other,
}

impl Decoder {
    fn read(decoder: &Value) -> Decoder {
        let parts: Vec<&str> = match decoder["decoders"].as_array() {
            Some(list) => list.iter().filter_map(|part| part["type"].as_str()).collect(),
            None => decoder["type"].as_str().into_iter().collect(),
        };
        if parts == ["ByteLevel"] {
            return Decoder::ByteLevel;
        }
        let byte_fallback = parts.contains(&"ByteFallback");
        if byte_fallback || parts.contains(&"Metaspace") {
            return Decoder::SentencePiece { byte_fallback };
        }
        Decoder::Other
    }

    fn append_bytes(&self, text: &str, alphabet: &HashMap<char, u8>, out: &mut Vec<u8>) {
        match self {
            Decoder::ByteLevel => {
                let start = out.len();
                for c in text.chars() {
                    match alphabet.get(&c) {
                        Some(byte) => out.push(*byte),
                        None => {
                            // The library's rule: a token with a foreign character stands for itself.
                            out.truncate(start);
                            out.extend_from_slice(text.as_bytes());
                            return;
                        }
                    }
                }
            }
            Decoder::SentencePiece { byte_fallback } => {
                let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) if *byte_fallback => out.push(byte),
                    _ => out.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
                }
            }
            Decoder::Other => out.extend_from_slice(text.as_bytes()),
        }
    }
}

/// The printable stand-ins of byte-level BPE: printable Latin-1 stands for itself, the other 68 bytes for the
/// characters from U+0100 on, in order.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    let mut alphabet = HashMap::with_capacity(256);
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            alphabet.insert(char::from(byte), byte);
        } else {
            alphabet.extend(char::from_u32(next).map(|c| (c, byte)));
            next += 1;
        }
    }
    alphabet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny_json() -> String {
        r#"{"version":"1.0","truncation":null,"padding":null,"normalizer":null,
            "added_tokens":[
              {"id":7,"content":"<end>","single_word":false,"lstrip":false,"rstrip":false,
               "normalized":false,"special":true},
              {"id":8,"content":"<think>","single_word":false,"lstrip":false,"rstrip":false,
               "normalized":false,"special":false}],
            "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,
              "use_regex":true},
            "post_processor":null,
            "decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
            "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
              "end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,
              "vocab":{"a":0,"b":1,"ab":2,"Ġ":3,"Ã":4,"©":5,"<":9},"merges":[["a","b"]]}}"#
            .to_string()
    }

    #[test]
    fn table_has_bytes_flags_and_holes() {
        let t = Tokenizer::new(tiny_json().as_bytes()).unwrap();
        assert_eq!(t.vocab_size(), 10);
        assert_eq!(t.token(2), Some((&b"ab"[..], 0)));
        assert_eq!(t.token(3), Some((&b" "[..], 0)));
        assert_eq!(t.token(4), Some((&b"\xc3"[..], 0)));
        assert_eq!(t.token(6), None);
        assert_eq!(t.token(7), Some((&b"<end>"[..], ADDED | SPECIAL)));
        assert_eq!(t.token(8), Some((&b"<think>"[..], ADDED)));
        assert_eq!(t.token(10), None);
        assert!(t.is_byte_level());
    }

    #[test]
    fn added_tokens_are_parsed_or_plain() {
        let t = Tokenizer::new(tiny_json().as_bytes()).unwrap();
        assert_eq!(t.encode("ab<end> a", true, true).unwrap(), [2, 7, 3, 0]);
        assert_eq!(t.encode("a<think>", true, false).unwrap(), [0, 8]);
        assert_eq!(t.encode("<ab", false, false).unwrap(), [9, 2]);
        assert!(!t.encode("<end>", false, false).unwrap().contains(&7));
        assert!(!t.encode("<think>", false, false).unwrap().contains(&8));
        assert_eq!(t.decode(&[4, 5, 6, 7, 77], true).unwrap(), "é");
        assert_eq!(t.decode(&[4, 7], false).unwrap(), "\u{fffd}<end>");
    }

    #[test]
    fn broken_json_is_refused() {
        for json in ["", "{", "{}", "[1]", r#"{"model":{"type":"BPE"}}"#] {
            assert_eq!(
                Tokenizer::new(json.as_bytes()).err().map(|f| f.status),
                Some(Status::Parse),
                "{json}"
            );
        }
        let huge = tiny_json().replace("\"<\":9", "\"<\":4294967295");
        assert!(Tokenizer::new(huge.as_bytes()).err().unwrap().message.contains("4294967295"));
        let moved = tiny_json().replace("\"id\":8", "\"id\":11");
        assert!(Tokenizer::new(moved.as_bytes()).err().unwrap().message.contains("<think>"));
    }

    #[test]
    fn sentencepiece_tokens_have_bytes() {
        let decoder = Decoder::read(&serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}]}));
        let mut out = Vec::new();
        decoder.append_bytes("▁a", &HashMap::new(), &mut out);
        decoder.append_bytes("<0xE9>", &HashMap::new(), &mut out);
        assert_eq!(out, b" a\xe9");
    }
}
