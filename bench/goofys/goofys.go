//go:build never

// Package goofys keeps the program in go.mod; bench/install builds it.
package goofys

import _ "github.com/kahing/goofys"
