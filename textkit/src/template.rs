//! A Jinja chat template, rendered as transformers renders it (jinja2's sandbox with trim_blocks,
//! lstrip_blocks, loop controls and a few functions of its own), on a budget of steps.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{from_args, Kwargs, Rest, Serde, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind};

use crate::{methods, pyfmt, Failure, Status};

const NAME: &str = "chat_template";
/// Begins the detail of the error that raise_exception makes: no other error has it.
const RAISED: &str = "\u{1}raised:";

pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    pub fn new(source: &str) -> Result<Template, Failure> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Failure::new(Status::Parse, describe(&e)))?);
        environment.set_recursion_limit(200);
        environment.set_unknown_method_callback(methods::call);
        environment
            .set_formatter(|out, _state, value| out.write_str(&pyfmt::py_str(value)?).map_err(Error::from));
        environment.add_filter("tojson", pyfmt::tojson);
        environment.add_filter("string", |value: &Value| pyfmt::py_str(value));
        environment.add_filter("default", default_filter);
        environment.add_filter("d", default_filter);
        environment.add_filter("indent", indent_filter);
        environment.add_test("iterable", is_iterable);
        environment.add_test("sequence", is_sequence);
        environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        environment.add_function("strftime_now", |format: &str| strftime_now(format));
        environment
            .add_template_owned(NAME, prepare_source(source))
            .map_err(|e| Failure::new(Status::Parse, describe(&e)))?;
        Ok(Template { environment })
    }

    pub fn render(&self, variables: &str, fuel: u64) -> Result<String, Failure> {
        let tree: serde_json::Value = serde_json::from_str(variables)
            .map_err(|e| Failure::new(Status::Parse, format!("template variables: {e}")))?;
        // Fuel belongs to an environment; a copy shares the compiled template (about 10 us).
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let result = environment.get_template(NAME).and_then(|template| template.render(Serde(&tree)));
        result.map_err(|error| failure_of(&error))
    }
}

/// jinja2 normalises line ends; `{% generation %}` only marks what a trainer may learn from.
fn prepare_source(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        match generation_tag(tag) {
            Some((replacement, length)) => {
                out.push_str(&replacement);
                rest = &tag[length..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// `{%- generation %}` -> `{%- if true %}`; None for any other tag. Also the length of what is replaced.
fn generation_tag(tag: &str) -> Option<(String, usize)> {
    let end = tag.find("%}")?;
    let inner = &tag[2..end];
    let bare = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
    let statement = match bare.trim() {
        "generation" => " if true ",
        "endgeneration" => " endif ",
        _ => return None,
    };
    let lead = &inner[..inner.len() - inner.trim_start_matches(['-', '+']).len()];
    let trail = &inner[inner.trim_end_matches(['-', '+']).len()..];
    Some((format!("{{%{lead}{statement}{trail}%}}"), end + 2))
}

fn describe(error: &Error) -> String {
    let detail =
        error.detail().map_or_else(|| error.kind().to_string(), |d| format!("{}: {d}", error.kind()));
    match error.line() {
        Some(line) => format!("{detail} (line {line})"),
        None => detail,
    }
}

fn failure_of(error: &Error) -> Failure {
    let mut link: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut innermost = error;
    while let Some(current) = link {
        if let Some(inner) = current.downcast_ref::<Error>() {
            if let Some(message) = inner.detail().and_then(|d| d.strip_prefix(RAISED)) {
                return Failure::new(Status::Raised, message);
            }
            if inner.kind() == ErrorKind::OutOfFuel {
                return Failure::new(Status::Limit, "the template took too many steps");
            }
            innermost = inner;
        }
        link = current.source();
    }
    Failure::new(Status::Template, describe(innermost))
}

fn default_filter(value: Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (other, boolean, kwargs): (Option<Value>, Option<Value>, Kwargs) = from_args(&args)?;
    let other = other.or(kwargs.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(kwargs.get("boolean")?).is_some_and(|b| b.is_true());
    kwargs.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value })
}

/// indent(text, width=4, first=False, blank=False) of jinja2, which keeps a final line end.
fn indent_filter(text: &str, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (width, first, blank, kwargs): (Option<Value>, Option<Value>, Option<Value>, Kwargs) =
        from_args(&args)?;
    let width = width.or(kwargs.get("width")?);
    let first = first.or(kwargs.get("first")?).is_some_and(|v| v.is_true());
    let blank = blank.or(kwargs.get("blank")?).is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let indention = match width {
        None => " ".repeat(4),
        Some(text) if text.as_str().is_some() => text.as_str().unwrap_or_default().to_string(),
        Some(width) => " ".repeat(i64::try_from(width)?.clamp(0, 1024) as usize),
    };
    let mut out = String::new();
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let wanted = if index == 0 { first } else { blank || !line.is_empty() };
        if wanted {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn is_iterable(value: &Value) -> bool {
    value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
}

/// jinja2 asks for a length and for items by index: strings and dicts have both.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

/// datetime.now().strftime(format).
fn strftime_now(format: &str) -> Result<String, Error> {
    let refuse = |why: &'static str| Error::new(ErrorKind::InvalidOperation, why);
    if format.is_empty() {
        return Ok(String::new());
    }
    let format = std::ffi::CString::new(format).map_err(|_| refuse("strftime_now: the format has a NUL"))?;
    let mut buffer = vec![0u8; 1024];
    // SAFETY: every pointer is to a live local; strftime writes at most the given number of bytes.
    let length = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut parts).is_null() {
            return Err(refuse("strftime_now: no local time"));
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &parts)
    };
    buffer.truncate(length);
    String::from_utf8(buffer).map_err(|_| refuse("strftime_now: the result is not UTF-8"))
}

#[cfg(test)]
#[path = "template_test.rs"]
mod tests;
