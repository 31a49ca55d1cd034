"""Names of columns in several languages, and the role that each means."""

from __future__ import annotations

import re
import unicodedata

from lora_llava.data.formats import FORMATS, IMAGE_COLUMNS

_WORDS: dict[str, str] = {
    # English beside what the formats list; German; French; Spanish; Italian; Portuguese; Dutch; Polish; Swedish
    "image": "imagefile imagefilename imagefilepath imagename filepath filename bild bilder bilddatei bildname "
    "bildpfad foto fotos datei dateiname dateipfad pfad photo photos fichier nomfichier nomdufichier chemin imagen "
    "imagenes archivo nombrearchivo nombredearchivo fichero ruta immagine immagini nomefile percorso imagem imagens "
    "arquivo nomedoarquivo ficheiro caminho afbeelding afbeeldingen bestand bestandsnaam zdjecie obraz plik obrazek "
    "fil filnamn 图片 图像 画像 изображение файл",
    "question": "frage fragen questions questiontext pregunta preguntas domanda domande pergunta perguntas vraag "
    "vragen pytanie fraga 问题 質問 вопрос",
    "answer": "antwort antworten answers answertext reponse reponses respuesta respuestas risposta risposte resposta "
    "respostas antwoord antwoorden odpowiedz svar 答案 回答 ответ",
    "caption": "captions beschreibung bildbeschreibung bildunterschrift bildtext legende descripcion leyenda "
    "piedefoto descrizione didascalia descricao legenda beschrijving bijschrift opis beskrivning 描述 описание",
    "label": "label labels class classes classname category klasse klassen kategorie etikett befund fehler classe "
    "categorie etiquette defaut clase categoria etiqueta defecto etichetta difetto rotulo defeito categorieen "
    "labelname defect tag klasa kategoria klass kategori etykieta 标签 类别 метка класс",
}
"""Names without accents, capitals, spaces and signs, by role."""
_PARTS = re.compile(r"[\W_]+")


def plain_name(name: str) -> str:
    """Return a column's name without capitals, accents, spaces and signs; one in other letters keeps them."""
    split = unicodedata.normalize("NFKD", name.casefold().replace("ß", "ss"))
    return _PARTS.sub("", "".join(each for each in split if not unicodedata.combining(each)))


def _known() -> dict[str, str]:
    found: dict[str, str] = {plain_name(word): "label" for word in _WORDS["label"].split()}
    for each in FORMATS:
        for role, names in each.aliases.items():
            for name in names:
                found.setdefault(plain_name(name), role)
    for name in IMAGE_COLUMNS:
        found.setdefault(plain_name(name), "image")
    for role, words in _WORDS.items():
        for word in words.split():
            found.setdefault(plain_name(word), role)
    return found


_ROLES = _known()


def role_of(column: str) -> str | None:
    """Return the role that a column's name means: image, question, answer, caption or label; None if unknown."""
    return _ROLES.get(plain_name(column))


def words_of(role: str) -> tuple[str, ...]:
    """Return the names in other languages that mean a role, the likeliest first."""
    return tuple(map(plain_name, _WORDS.get(role, "").split()))
