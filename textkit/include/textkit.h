/* textkit: Hugging Face tokenizers and Jinja chat templates behind one C ABI.
   All text is UTF-8 with an explicit length. Every int32_t result is a TK_* status unless said otherwise;
   `err` (may be null) then gets a message to free. A panic never crosses: it becomes TK_ERR_PANIC. Objects
   are immutable and may be shared by threads. Called by src/text alone. */
#ifndef TEXTKIT_H
#define TEXTKIT_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum {
  TK_OK = 0,
  TK_ERR_ARG = 1,      /* null pointer, text that is not UTF-8 */
  TK_ERR_PARSE = 2,    /* tokenizer.json, template source or context JSON is broken */
  TK_ERR_TEMPLATE = 3, /* the template failed while it ran */
  TK_ERR_RAISED = 4,   /* the template called raise_exception; the message is its argument */
  TK_ERR_LIMIT = 5,    /* the template used up its fuel */
  TK_ERR_PANIC = 99
};
/* Flags of a token. */
enum { TK_ADDED = 1, TK_SPECIAL = 2 };

typedef struct {
  uint8_t* data;
  size_t len, cap;
} tk_bytes;
typedef struct {
  uint32_t* data;
  size_t len, cap;
} tk_ids;
typedef struct tk_tokenizer tk_tokenizer;
typedef struct tk_template tk_template;

void tk_init(void); /* keeps panic messages off stderr; call before anything else, any number of times */
int32_t tk_test_panic(void); /* panics inside: TK_ERR_PANIC */
void tk_bytes_free(tk_bytes*);
void tk_ids_free(tk_ids*);

/* `json` is a tokenizer.json. */
int32_t tk_tokenizer_new(const uint8_t* json, size_t n, tk_tokenizer** out, tk_bytes* err);
void tk_tokenizer_free(tk_tokenizer*);
size_t tk_tokenizer_vocab_size(const tk_tokenizer*); /* highest id + 1 */
/* 1 when the decoder is ByteLevel: the text of ids is then exactly the joined bytes of the tokens. */
int32_t tk_tokenizer_is_byte_level(const tk_tokenizer*);
int64_t tk_tokenizer_token_id(const tk_tokenizer*, const uint8_t* s, size_t n); /* -1: no such token */
/* The bytes of a token, owned by the tokenizer. Returns its flags (0 for a plain token), or -1 where no token
   has this id. Outside of ByteLevel decoders the bytes are the nearest text of the token alone. */
int32_t tk_tokenizer_token_bytes(const tk_tokenizer*, uint32_t id, const uint8_t** p, size_t* n);
/* parse_added 0: added tokens written in the text are plain text. add_special 1: the post-processor runs. */
int32_t tk_tokenizer_encode(const tk_tokenizer*, const uint8_t* s, size_t n, int32_t parse_added,
                            int32_t add_special, tk_ids* out, tk_bytes* err);
/* Ids outside the vocabulary are skipped. The text is valid UTF-8: broken sequences become U+FFFD. */
int32_t tk_tokenizer_decode(const tk_tokenizer*, const uint32_t* ids, size_t n, int32_t skip_special,
                            tk_bytes* out, tk_bytes* err);

int32_t tk_template_new(const uint8_t* src, size_t n, tk_template** out, tk_bytes* err);
void tk_template_free(tk_template*);
/* `variables` is a JSON object. One fuel is about one instruction or 64 bytes of data. */
int32_t tk_template_render(const tk_template*, const uint8_t* variables, size_t n, uint64_t fuel,
                           tk_bytes* out, tk_bytes* err);

#ifdef __cplusplus
}
#endif
#endif
