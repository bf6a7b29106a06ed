// The little JSON that the command line needs: reading values of answers and flags, merging dotted flags,
// quoting. Not the API's requests (http/) and not config.json (model/), which use base/json.h directly.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace tessera::cli {

// kInvalid unless `text` is one JSON object.
Status CheckJsonObject(std::string_view text);
// The value at a JSON pointer ("/data/0/id"); absent where there is none of that type, or `json` is not JSON.
std::optional<std::string> JsonString(std::string_view json, std::string_view pointer);
std::optional<double> JsonNumber(std::string_view json, std::string_view pointer);
// Keys of the object, in order of their names.
Result<std::string> JsonKeys(std::string_view object);  // joined by ", "

// `object` with the value at `path` ("a.b") replaced, or appended to the list there when `path` ends in '+'.
// `value` is JSON where it parses, a string otherwise. `*replaced` says whether a value was overwritten.
Result<std::string> JsonSet(std::string_view object, std::string_view path, std::string_view value,
                            bool* replaced);
// `base` with the keys of `object` on top. `*replaced` names the keys that were overwritten.
Result<std::string> JsonMerge(std::string_view base, std::string_view object, std::string* replaced);

// "text" with quotes and escapes; bytes that are not UTF-8 become U+FFFD.
std::string JsonQuote(std::string_view text);

}  // namespace tessera::cli
